// Draw with a fused graph in Node.js; the graph takes token ids and noise and gives pixels.
//
//     npm install
//     node draw.js exported/ feeds.json picture.ppm
//
// feeds.json holds {"input_ids": {"dims": [1, 77], "data": [...]}, ..., "noise": {...}}: token ids
// from any tokenizer (such as @huggingface/tokenizers), noise from any normal generator. With
// `fewstep export feeds` it holds those of a prompt and a seed, and the picture is fewstep's own.

"use strict";
const fs = require("fs");
const path = require("path");
const ort = require("onnxruntime-node");

async function main([folder, feedsFile, out]) {
  if (!out) throw new Error("usage: node draw.js FOLDER FEEDS.json PICTURE.ppm");
  const session = await ort.InferenceSession.create(path.join(folder, "fused", "model.onnx"));
  const feeds = {};
  for (const [name, { dims, data }] of Object.entries(JSON.parse(fs.readFileSync(feedsFile)))) {
    feeds[name] =
      name === "noise"
        ? new ort.Tensor("float32", Float32Array.from(data), dims)
        : new ort.Tensor("int64", BigInt64Array.from(data.map(BigInt)), dims);
  }
  const { images } = await session.run(feeds);
  const [, height, width] = images.dims;
  const pixels = Buffer.from(images.data.subarray(0, height * width * 3));
  fs.writeFileSync(out, Buffer.concat([Buffer.from(`P6\n${width} ${height}\n255\n`), pixels]));
  console.log(out);
}

main(process.argv.slice(2)).catch((error) => {
  console.error(error.message);
  process.exit(1);
});
