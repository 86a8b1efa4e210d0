"""Draw with a fused graph: ONNX Runtime, tokenizers, numpy and Pillow; no fewstep, no torch.

    pip install onnxruntime tokenizers numpy Pillow
    python draw_fused.py exported/ "a handwritten seven" --seed 7 --out seven.png

`exported/` is what `fewstep export onnx --fused` wrote. The picture for a seed is not fewstep's:
its noise stream is torch's, which this example does not repeat (fewstep.noise does, in 60 lines).
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def token_ids(folder: Path, prompt: str, length: int) -> np.ndarray:
    """One row of ids, cut or padded to the graph's length."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer.enable_truncation(length)
    tokenizer.no_padding()
    ids = tokenizer.encode(prompt).ids
    pad = tokenizer.token_to_id(config.get("pad_token") or "") or 0
    return np.array([ids + [pad] * (length - len(ids))], np.int64)


def main() -> None:
    """Read the command line, draw one picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    given = parser.parse_args()
    session = onnxruntime.InferenceSession(str(given.folder / "fused" / "model.onnx"))
    feeds = {}
    for wanted in session.get_inputs():
        if wanted.name == "noise":
            noise = np.random.default_rng(given.seed).standard_normal((1, *wanted.shape[1:]))
            feeds["noise"] = noise.astype(np.float32)
        else:  # input_ids, input_ids_2: one per text encoder, its tokenizer beside it
            name = wanted.name.replace("input_ids", "tokenizer")
            feeds[wanted.name] = token_ids(given.folder / name, given.prompt, wanted.shape[1])
    (pictures,) = session.run(["images"], feeds)
    Image.fromarray(pictures[0]).save(given.out)


if __name__ == "__main__":
    main()
