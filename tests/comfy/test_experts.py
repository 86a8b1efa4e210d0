"""Phase experts in ComfyUI: one loop, one run per phase, FewStepPipeline and core nodes agree."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.recipe import Expert, FewStepRecipe
from tests.comfy.adapter_files import adapter_file
from tests.comfy.graph import Graph, Node
from tests.comfy.harness import Comfy, GraphFailed
from tests.comfy.references import PROMPT_SEED, network_scale, reference, relative_error
from tests.comfy.testkit import latents
from tests.comfy.tiny_models import SD3, SD15, WAN, TinyModel

SEED = 5
PARITY = 1e-5
HIGH, LOW = "high_noise", "low_noise"
SAMPLING = {"steps": 0, "denoise": 1.0, "noise": "reproducible (CPU)"}
ONE_LOOP, PER_PHASE = "one loop", "one run per phase"


def expert_recipe(model: TinyModel, *, own_networks: bool = False, **changes: Any) -> FewStepRecipe:
    """Four steps, the first two of one expert and the last two of the other."""
    recipe = model.recipe(model.family, **changes)
    grid = recipe.grids[0]
    bound = (grid.sigmas[1] + grid.sigmas[2]) / 2.0
    places = ("transformer", "transformer_2") if own_networks else (None, None)
    experts = (
        Expert(adapter=HIGH, sigma_high=1.0, sigma_low=bound, component=places[0]),
        Expert(adapter=LOW, sigma_high=bound, sigma_low=0.0, component=places[1]),
    )
    return replace(recipe, experts=experts, grids=(replace(grid, experts=(0, 0, 1, 1)),))


def expert_files(folder: Path, model: TinyModel, recipe: FewStepRecipe) -> dict[str, Path]:
    """A file per expert."""
    places = {expert.adapter: expert.component for expert in recipe.experts}
    return {
        name: adapter_file(
            folder / f"{model.name}-{name}.safetensors",
            model,
            recipe,
            seed=seed,
            component=places[name],
            layers=("to_q", "to_v") if name == HIGH else ("to_q", "to_k"),
        )
        for seed, name in enumerate((HIGH, LOW), start=1)
    }


def base(graph: Graph, comfy: Comfy, model: TinyModel) -> Node:
    return graph.add("UNETLoader", unet_name=model.save(comfy.folder), weight_dtype="default")


def loaded(graph: Graph, model: Node, file: Path, **more: Any) -> Node:
    return graph.add(
        "FewStepLoraLoader", model=model, lora_name=file.name, **{"strength": 1.0, **more}
    )


def style(graph: Graph, model: Node, file: Path) -> Node:
    return graph.add("LoraLoaderModelOnly", model=model, lora_name=file.name, strength_model=0.7)


def prompt(graph: Graph, model: TinyModel, seed: int = PROMPT_SEED) -> Node:
    return graph.add("FewStepTestConditioning", seed=seed, **model.conditioning)


def guided(graph: Graph, model: TinyModel, patched: Node, **more: Any) -> Node:
    given = {"guidance": -1.0, **more}
    return graph.add("FewStepGuider", model=patched, positive=prompt(graph, model), **given)


def sampled(
    graph: Graph,
    model: TinyModel,
    patched: Node,
    guider: Node,
    *,
    sampler: Any = None,
    latent: Node | None = None,
) -> Node:
    """SamplerCustomAdvanced under the sigmas of Few-Step Sampling."""
    sampling = graph.add("FewStepSampling", model=patched, **SAMPLING)
    kind, inputs = model.empty_latent
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("RandomNoise", noise_seed=SEED),
        guider=guider,
        sampler=sampler or sampling.out(0),
        sigmas=sampling.out(1),
        latent_image=latent or graph.add(kind, **inputs),
    )


def run(comfy: Comfy, model: TinyModel, graph: Graph, latent: Node | list[Any]) -> Tensor:
    graph.capture(latent, "latent")
    return network_scale(model, comfy.run(graph.prompt)["latent"]["samples"])


def two_experts(graph: Graph, comfy: Comfy, model: TinyModel, files: dict[str, Path]) -> Node:
    """Both experts over one base, one loader after the other."""
    return loaded(graph, loaded(graph, base(graph, comfy, model), files[HIGH]), files[LOW])


def masked(graph: Graph, model: TinyModel) -> Node:
    """A picture of which the left half is to be drawn."""
    picture = graph.add(
        "FewStepTestLatent", seed=9, shape=",".join(map(str, (1, *model.latent_shape)))
    )
    mask = graph.add("FewStepTestMask", height=model.pixels, width=model.pixels)
    return graph.add("SetLatentNoiseMask", samples=picture, mask=mask)


@pytest.mark.parametrize("stochasticity", [0.0, 1.0])
@pytest.mark.parametrize("model", [SD3, SD15], ids=lambda model: model.name)
def test_one_base_draws_what_the_pipeline_draws(
    comfy: Comfy, model: TinyModel, stochasticity: float
) -> None:
    recipe = expert_recipe(model, stochasticity=stochasticity)
    files = expert_files(comfy.folder / "loras", model, recipe)
    expected = reference(model, recipe, seed=SEED, adapter=files)
    for way in (ONE_LOOP, PER_PHASE):
        graph = Graph()
        patched = two_experts(graph, comfy, model, files)
        guider = guided(graph, model, patched, experts=way)
        drawn = run(comfy, model, graph, sampled(graph, model, patched, guider))
        assert relative_error(drawn, expected) < PARITY, way
    graph = Graph()
    kind, inputs = model.empty_latent
    drawn = graph.add(
        "FewStepKSampler",
        model=two_experts(graph, comfy, model, files),
        positive=prompt(graph, model),
        latent_image=graph.add(kind, **inputs),
        seed=SEED,
        **SAMPLING,
    )
    assert relative_error(run(comfy, model, graph, drawn), expected) < PARITY


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_two_networks_draw_what_two_stock_runs_draw(comfy: Comfy, scale: float) -> None:
    """Wan 2.2's way: a MODEL for high and one for low noise, whichever is connected first."""
    recipe = expert_recipe(WAN, own_networks=True)
    files = expert_files(comfy.folder / "loras", WAN, recipe)

    def models(graph: Graph) -> list[Node]:
        return [loaded(graph, other_base(graph, comfy, i), f) for i, f in enumerate(files.values())]

    graph = Graph()
    high, low = models(graph)
    expected = run(comfy, WAN, graph, stock_split(graph, WAN, high, (high, low), scale))
    for way in (ONE_LOOP, PER_PHASE):
        for swap in (False, True):
            graph = Graph()
            first, second = models(graph)[:: -1 if swap else 1]
            more = {"negative": prompt(graph, WAN, seed=1), "guidance": scale, "experts": way}
            guider = guided(graph, WAN, first, model_2=second, **more)
            drawn = run(comfy, WAN, graph, sampled(graph, WAN, first, guider))
            assert relative_error(drawn, expected) < PARITY, (way, swap)


def other_base(graph: Graph, comfy: Comfy, index: int) -> Node:
    """The tiny Wan, or a network of its size with other weights."""
    model = WAN if index == 0 else OTHER_WAN
    return base(graph, comfy, model)


def _other_network() -> torch.nn.Module:
    torch.manual_seed(77)
    return WAN.network()


OTHER_WAN = replace(WAN, name="wan-low", network=_other_network)


def stock_split(
    graph: Graph, model: TinyModel, sigmas_of: Node, experts: Sequence[Node], scale: float = 1.0
) -> Node:
    """Core nodes: Euler for two steps with one MODEL, then for two with the other."""
    sampling = graph.add("FewStepSampling", model=sigmas_of, **SAMPLING)
    split = graph.add("SplitSigmas", sigmas=sampling.out(1), step=2)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    kind, inputs = model.empty_latent
    latent, noise = graph.add(kind, **inputs), graph.add("RandomNoise", noise_seed=SEED)
    for slot, expert in enumerate(experts):
        guider = graph.add(
            "CFGGuider",
            model=expert,
            positive=prompt(graph, model),
            negative=prompt(graph, model, seed=1),
            cfg=scale,
        )
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=noise,
            guider=guider,
            sampler=euler,
            sigmas=split.out(slot),
            latent_image=latent,
        )
        noise = graph.add("DisableNoise")
    return latent


@pytest.mark.parametrize("order", ["before", "between", "after"])
def test_a_style_lora_reaches_every_phase(comfy: Comfy, order: str) -> None:
    """Against core nodes, where each phase has a MODEL with its expert and the style."""
    recipe, folder = expert_recipe(SD3), comfy.folder / "loras"
    files = expert_files(folder, SD3, recipe)
    styled = adapter_file(folder / "style.safetensors", SD3, None, spelling="comfyui", seed=8)
    plain = {
        name: adapter_file(
            folder / f"plain-{name}.safetensors",
            SD3,
            None,
            spelling="comfyui",
            seed=seed,
            layers=("to_q", "to_v") if name == HIGH else ("to_q", "to_k"),
        )
        for seed, name in enumerate((HIGH, LOW), start=1)
    }
    graph = Graph()
    source = base(graph, comfy, SD3)
    high, low = (
        graph.add(
            "LoraLoaderModelOnly",
            model=style(graph, source, styled),
            lora_name=plain[name].name,
            strength_model=1.0,
        )
        for name in (HIGH, LOW)
    )
    given = loaded(graph, base(graph, comfy, SD3), files[HIGH])  # for the sigmas alone
    given = loaded(graph, given, files[LOW])
    expected = run(comfy, SD3, graph, stock_split(graph, SD3, given, (high, low)))
    graph = Graph()
    patched = base(graph, comfy, SD3)
    for place, file in (("before", files[HIGH]), ("between", files[LOW]), ("after", None)):
        if order == place:
            patched = style(graph, patched, styled)
        if file is not None:
            patched = loaded(graph, patched, file)
    for way in (ONE_LOOP, PER_PHASE):
        one = Graph(dict(graph.prompt))
        guider = guided(one, SD3, patched, experts=way)
        drawn = run(comfy, SD3, one, sampled(one, SD3, patched, guider))
        assert relative_error(drawn, expected) < PARITY, way


@pytest.mark.parametrize("name", ["ours", "euler", "heun"])
def test_a_mask_is_kept_by_one_loop(comfy: Comfy, name: str) -> None:
    """Twice the same expert is one network: the picture of the plain adapter, mask and all."""
    recipe, folder = expert_recipe(SD3), comfy.folder / "loras"
    same = {
        expert: adapter_file(folder / f"same-{expert}.safetensors", SD3, recipe, seed=4)
        for expert in (HIGH, LOW)
    }
    alone = adapter_file(folder / "alone.safetensors", SD3, SD3.recipe("sd3"), seed=4)
    pictures = []
    for files in (same, None):
        graph = Graph()
        patched = (
            two_experts(graph, comfy, SD3, files)
            if files
            else loaded(graph, base(graph, comfy, SD3), alone)
        )
        sampler = None if name == "ours" else graph.add("KSamplerSelect", sampler_name=name)
        guider = guided(graph, SD3, patched)
        latent = masked(graph, SD3)
        node = sampled(graph, SD3, patched, guider, sampler=sampler, latent=latent)
        pictures.append(run(comfy, SD3, graph, node))
    assert relative_error(pictures[0], pictures[1]) < PARITY
    kept = pictures[0] - network_scale(SD3, latents(9, 1, *SD3.latent_shape))
    assert kept[..., 5:].abs().max() < 1e-5
    assert kept[..., :3].abs().max() > 1e-2


def test_a_mask_is_refused_by_one_run_per_phase(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    graph = Graph()
    patched = two_experts(graph, comfy, SD3, files)
    guider = guided(graph, SD3, patched, experts=PER_PHASE)
    node = sampled(graph, SD3, patched, guider, latent=masked(graph, SD3))
    with pytest.raises(GraphFailed, match='A mask needs experts "one loop"'):
        run(comfy, SD3, graph, node)


def test_image_to_image_may_begin_in_the_second_phase(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    low = replace(recipe, experts=(), grids=(replace(recipe.grids[0], experts=()),))
    alone = adapter_file(
        comfy.folder / "loras" / "low-alone.safetensors", SD3, low, seed=2, layers=("to_q", "to_k")
    )
    pictures = []
    for is_pair in (True, False):
        graph = Graph()
        if is_pair:
            patched = two_experts(graph, comfy, SD3, files)
        else:
            patched = loaded(graph, base(graph, comfy, SD3), alone)
        picture = graph.add("FewStepTestLatent", seed=9, shape="1,16,8,8")
        node = graph.add(
            "FewStepKSampler",
            model=patched,
            positive=prompt(graph, SD3),
            latent_image=picture,
            seed=SEED,
            **{**SAMPLING, "denoise": 0.4},
        )
        pictures.append(run(comfy, SD3, graph, node))
    assert torch.equal(*pictures)


def test_hooks_reach_every_phase(comfy: Comfy) -> None:
    """A LoRA on the prompt (ComfyUI's hooks) equals the same LoRA on MODEL."""
    recipe, folder = expert_recipe(SD3), comfy.folder / "loras"
    files = expert_files(folder, SD3, recipe)
    styled = adapter_file(folder / "hooked.safetensors", SD3, None, spelling="comfyui", seed=8)
    graph = Graph()
    patched = style(graph, two_experts(graph, comfy, SD3, files), styled)
    expected = run(comfy, SD3, graph, sampled(graph, SD3, patched, guided(graph, SD3, patched)))
    graph = Graph()
    patched = two_experts(graph, comfy, SD3, files)
    hooks = graph.add("CreateHookLoraModelOnly", lora_name=styled.name, strength_model=0.7)
    hooked = graph.add(
        "ConditioningSetProperties",
        cond_NEW=prompt(graph, SD3),
        strength=1.0,
        set_cond_area="default",
        hooks=hooks,
    )
    guider = graph.add("FewStepGuider", model=patched, positive=hooked, guidance=-1.0)
    drawn = run(comfy, SD3, graph, sampled(graph, SD3, patched, guider))
    assert relative_error(drawn, expected) < PARITY


def test_a_plain_sampler_is_stopped(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    graph = Graph()
    patched = two_experts(graph, comfy, SD3, files)
    guider = graph.add("BasicGuider", model=patched, conditioning=prompt(graph, SD3))
    with pytest.raises(GraphFailed) as failed:
        run(comfy, SD3, graph, sampled(graph, SD3, patched, guider))
    assert failed.value.message == (
        'MODEL carries 2 phase experts. Sample it with "Few-Step Guider" or "Few-Step KSampler"; a '
        "plain KSampler would ignore them."
    )


def test_an_expert_that_is_missing_is_named(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    graph = Graph()
    patched = loaded(graph, base(graph, comfy, SD3), files[HIGH])
    node = sampled(graph, SD3, patched, guided(graph, SD3, patched))
    with pytest.raises(GraphFailed, match="carries 1 of 2 phase experts. Load low_noise"):
        run(comfy, SD3, graph, node)


def test_the_same_expert_twice_is_refused(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    graph = Graph()
    once = loaded(graph, base(graph, comfy, SD3), files[HIGH])
    graph.capture(loaded(graph, once, files[HIGH]), "model")
    with pytest.raises(GraphFailed, match="has an adapter for phase 'high_noise' already"):
        comfy.run(graph.prompt)


def test_a_network_that_is_missing_is_named(comfy: Comfy) -> None:
    recipe = expert_recipe(WAN, own_networks=True)
    files = expert_files(comfy.folder / "loras", WAN, recipe)
    graph = Graph()
    patched = loaded(graph, base(graph, comfy, WAN), files[LOW])
    node = sampled(graph, WAN, patched, guided(graph, WAN, patched))
    with pytest.raises(GraphFailed, match="Connect the MODEL of high_noise to model_2"):
        run(comfy, WAN, graph, node)


@pytest.mark.parametrize("way", [ONE_LOOP, PER_PHASE])
def test_a_run_leaves_nothing_behind(comfy: Comfy, way: str) -> None:
    """Base alone, experts, base alone and experts again, on one network in memory."""
    import comfy.samplers as samplers  # pyright: ignore[reportMissingImports]

    from fewstep.comfy_nodes.expert_guider import make_guider

    files = expert_files(comfy.folder / "loras", SD3, expert_recipe(SD3))
    graph = Graph()
    source = base(graph, comfy, SD3)
    patched = loaded(graph, loaded(graph, source, files[HIGH]), files[LOW])
    sampling = graph.add("FewStepSampling", model=patched, **SAMPLING)
    euler = graph.add("KSamplerSelect", sampler_name="euler")
    for name, value in (("source", source), ("patched", patched), ("euler", euler)):
        graph.capture(value, name)
    graph.capture(sampling.out(1), "sigmas")
    graph.capture(prompt(graph, SD3), "prompt")
    caught = comfy.run(graph.prompt)
    model = caught["patched"]

    def draw(guider: Any) -> Tensor:
        noise = latents(SEED, 1, *SD3.latent_shape)
        return guider.sample(
            noise, 0 * noise, caught["euler"], caught["sigmas"], disable_pbar=True, seed=SEED
        )

    plain = samplers.CFGGuider(caught["source"])
    plain.inner_set_conds({"positive": caught["prompt"]})
    named = model.get_attachment("fewstep")
    ours: Any = make_guider(model, caught["prompt"], None, named, experts=way)  # pyright: ignore
    first, second, third = draw(plain), draw(ours), draw(plain)
    assert torch.equal(first, third)
    assert torch.equal(second, draw(ours))
    again = make_guider(model, caught["prompt"], None, named, experts=way)  # pyright: ignore
    assert torch.equal(second, draw(again))
    assert relative_error(second, first) > 1e-3
    assert not caught["source"].patches


def test_progress_counts_all_phases(comfy: Comfy) -> None:
    recipe = expert_recipe(SD3)
    files = expert_files(comfy.folder / "loras", SD3, recipe)
    for way in (ONE_LOOP, PER_PHASE):
        graph = Graph()
        patched = two_experts(graph, comfy, SD3, files)
        run(
            comfy,
            SD3,
            graph,
            sampled(graph, SD3, patched, guided(graph, SD3, patched, experts=way)),
        )
        assert comfy.progress == [(i, 4) for i in range(1, 5)], way


def test_guidance_asks_for_a_negative_prompt(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "guided.safetensors", SD3, SD3.recipe("sd3"))
    graph = Graph()
    patched = loaded(graph, base(graph, comfy, SD3), file)
    node = sampled(graph, SD3, patched, guided(graph, SD3, patched, guidance=4.0))
    with pytest.raises(GraphFailed, match=r"Guidance is 4\.0: connect a negative prompt, or set"):
        run(comfy, SD3, graph, node)


def test_guidance_beside_the_recipe_is_told(comfy: Comfy) -> None:
    file = adapter_file(comfy.folder / "loras" / "guided.safetensors", SD3, SD3.recipe("sd3"))
    graph = Graph()
    patched = loaded(graph, base(graph, comfy, SD3), file)
    negative = graph.add("FewStepTestConditioning", seed=1, **SD3.conditioning)
    guider = guided(graph, SD3, patched, guidance=4.0, negative=negative)
    run(comfy, SD3, graph, sampled(graph, SD3, patched, guider))
    assert list(comfy.ui[guider.id]["text"]) == [
        "Warning: guidance 4.0 on a recipe trained for 1.0: expect burnt colours and half the "
        "speed."
    ]
