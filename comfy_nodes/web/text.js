// What a Few-Step node found, written on the node: ComfyUI shows a node's text only for its own
// preview node.

import { app } from "../../scripts/app.js";

const WIDGET = "few_step_text";
const LINE_PX = 15;
const CHARACTER_PX = 6.7;
const MAX_LINES = 18;
const PADDING_PX = 4;

function makeBox() {
  const box = document.createElement("pre");
  Object.assign(box.style, {
    margin: "0",
    padding: `${PADDING_PX}px 6px`,
    overflow: "auto",
    whiteSpace: "pre-wrap",
    overflowWrap: "anywhere",
    font: "11px/15px monospace",
    color: "var(--input-text, #ddd)",
    background: "var(--comfy-input-bg, #222)",
    borderRadius: "4px",
    boxSizing: "border-box",
    contain: "size", // its node is as high as heightOf says, not as the whole text
  });
  return box;
}

function heightOf(box, nodeWidth) {
  const perLine = Math.max(10, Math.floor((nodeWidth - 44) / CHARACTER_PX));
  const lines = box.textContent
    .split("\n")
    .reduce((count, line) => count + Math.max(1, Math.ceil(line.length / perLine)), 0);
  return Math.min(lines, MAX_LINES) * LINE_PX + 10;
}

function addBox(node) {
  const box = makeBox();
  // A type of its own: Vue nodes draw one they know, such as "text", as an input of their own.
  const widget = node.addDOMWidget(WIDGET, WIDGET, box, {
    serialize: false,
    getMinHeight: () => heightOf(box, node.size[0]),
  });
  widget.serialize = false; // not a value of the workflow
  widget.box = box;
  return widget;
}

function show(node, lines) {
  const known = node.widgets?.find((widget) => widget.name === WIDGET);
  if (!lines?.length && !known) return;
  const widget = known ?? addBox(node);
  widget.box.textContent = (lines ?? []).join("\n"); // as text: files wrote parts of it
  const inside = heightOf(widget.box, node.size[0]) - 2 * PADDING_PX;
  widget.box.style.containIntrinsicHeight = `${inside}px`;
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

app.registerExtension({
  name: "few-step.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.includes("FewStep")) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      show(this, output?.text);
    };
  },
});
