"""What each family's folder holds: contracts of the graphs, and what no host could run."""

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from fewstep.errors import ExportError
from fewstep.export.families.pixart import pixart_transformer_part
from fewstep.export.families.qwen_image import qwen_transformer_part
from fewstep.export.families.registry import FAMILIES, family_of
from fewstep.export.families.sana import sana_transformer_part
from fewstep.export.families.wan import Wan, wan_transformer_part
from fewstep.export.families.z_image import ZImage, z_image_transformer_part
from fewstep.export.optimising import make_graph
from fewstep.runtime.hosts.registry import HOSTS
from fewstep.runtime.manifest import read_manifest
from tests.export.tiny_exports import BY_NAME, EVERY, exported
from tests.tiny.distilled import build_sana_sprint
from tests.tiny.video import build_wan22
from tests.trainer import tiny_text
from tests.trainer.backbone_cases import with_config

FORBIDDEN = {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128}
SEQUENCES = {"SequenceAt", "SplitToSequence", "SequenceConstruct", "Loop", "If", "NonZero"}
BATCH = "batch_size"
UNREAD = ("to_add_out", "txt_mlp")
"""Of the last block, whose text states go nowhere."""


def test_every_family_that_is_exported_has_a_host_and_the_reverse() -> None:
    assert {family.name for family in FAMILIES} == {host.family for host in HOSTS}


def test_wan_22_is_one_graph_per_half_of_the_noise() -> None:
    pipe: Any = build_wan22()
    with pytest.raises(ExportError, match="has no text_encoder"):
        Wan().parts(pipe)
    pipe.text_encoder = tiny_text.t5(16, multilingual=True)
    assert [part.name for part in Wan().parts(pipe)] == [
        "text_encoder",
        "transformer",
        "transformer_2",
        "vae_decoder",
    ]


@pytest.mark.slow
def test_wan_keeps_frames_height_and_width_free() -> None:
    part = wan_transformer_part("transformer", build_wan22().components["transformer"])
    model = make_graph(part, opset=18)
    shape = model.graph.inputs[0].shape
    assert shape is not None
    assert str(shape[2]) == "num_frames"
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    for sizes in ({"num_frames": 1, "height": 6, "width": 4}, {"num_frames": 5}):
        feeds = part.example({**part.sizes, **sizes}, seed=3)
        with torch.no_grad():
            wanted = part.module.eval()(*feeds.values())
        got: Any
        (got,) = session.run(None, {name: value.numpy() for name, value in feeds.items()})
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-5)


@EVERY
def test_graphs_hold_nothing_that_engines_lack(name: str) -> None:
    folder = exported(name)
    for graph in read_manifest(folder).graphs.values():
        model = onnx.load(folder / graph.file, load_external_data=False)
        assert not {node.op_type for node in model.graph.node} & SEQUENCES, graph.file
        assert {node.domain for node in model.graph.node} == {""}
        types = {tensor.data_type for tensor in model.graph.initializer}
        casts = {
            attribute.i
            for node in model.graph.node
            if node.op_type == "Cast"
            for attribute in node.attribute
            if attribute.name == "to"
        }
        assert not (types | casts) & FORBIDDEN, graph.file


@EVERY
def test_linear_weights_keep_their_parameters_names(name: str) -> None:
    """What a LoRA is merged into, or refitted: every one but those that nothing reads."""
    folder, component = exported(name), family_of(_class(name)).denoiser
    graph = read_manifest(folder).graphs[component]
    model = onnx.load(folder / graph.file, load_external_data=False)
    names = {tensor.name.removesuffix("::T") for tensor in model.graph.initializer}
    network = BY_NAME[name].build().components[component]
    linear = {
        f"model.{key}.weight"
        for key, module in network.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    missing = {key for key in linear - names if not any(part in key for part in UNREAD)}
    assert not missing
    assert len(linear & names) >= 0.8 * len(linear)


def _class(name: str) -> str:
    return type(BY_NAME[name].build()).__name__


DENOISER_INPUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "flux-dev": {
        "hidden_states": (BATCH, "packed_height_width", "4"),
        "timestep": ("1",),
        "guidance": (BATCH,),
        "pooled_projections": (BATCH, "32"),
        "encoder_hidden_states": (BATCH, "sequence_length", "32"),
        "txt_ids": ("sequence_length", "3"),
        "img_ids": ("packed_height_width", "3"),
    },
    "sana": {
        "hidden_states": (BATCH, "4", "height", "width"),
        "encoder_hidden_states": (BATCH, "sequence_length", "8"),
        "encoder_attention_mask": (BATCH, "sequence_length"),
        "timestep": ("1",),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DENOISER_INPUTS)
def test_denoisers_take_what_optimum_gives(name: str) -> None:
    graph = read_manifest(exported(name)).graphs["transformer"]
    assert {tensor.name: tensor.dims for tensor in graph.inputs} == DENOISER_INPUTS[name]
    if name == "flux-dev":
        assert [tensor.name for tensor in graph.inputs] == list(DENOISER_INPUTS[name])


def test_variants_with_other_inputs_are_refused_in_a_sentence() -> None:
    sprint = build_sana_sprint().components["transformer"]
    edit = with_config(BY_NAME["qwen-image"].build, zero_cond_t=True)().transformer
    reading = with_config(BY_NAME["z-image"].build, siglip_feat_dim=8)().transformer
    makers: list[tuple[Any, Any]] = [
        (sana_transformer_part, sprint),
        (qwen_transformer_part, edit),
        (z_image_transformer_part, reading),
    ]
    for make, model in makers:
        with pytest.raises(ExportError, match="use the pipeline"):
            make("transformer", model)


def test_a_chat_template_that_changes_the_prompt_is_refused() -> None:
    pipe = BY_NAME["z-image"].pipeline()
    assert ZImage().texts(pipe) == {"before": "user ", "after": " end "}
    pipe.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(ExportError, match="chat template"):
        ZImage().texts(pipe)


def test_a_learned_variance_is_dropped() -> None:
    model = BY_NAME["pixart-sigma"].build().components["transformer"]
    assert model.config.out_channels == 2 * model.config.in_channels
    part = pixart_transformer_part("transformer", model)
    found = part.module.eval()(*part.example().values())
    assert found.shape == part.example()["hidden_states"].shape
    assert np.isfinite(found.detach().numpy()).all()
