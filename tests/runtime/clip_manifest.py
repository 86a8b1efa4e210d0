"""The manifest of a folder that makes clips, for whoever asks it for sizes alone."""

from fewstep.runtime.manifest import Graph, Manifest

SETTINGS = {
    "vae_scale_factor": 8.0,
    "vae_scale_factor_temporal": 4.0,
    "latent_channels": 4.0,
    "height": 480.0,
    "width": 832.0,
    "num_frames": 81.0,
    "frames_per_second": 16.0,
}


def manifest_of(*networks: str, experts: tuple[str, ...] = ()) -> Manifest:
    """Of a folder with such networks, whose files are nowhere."""
    multiples = {"height": 2, "width": 2}
    graph = Graph(file="", inputs=(), outputs=(), opset=18, precision="fp32", multiples=multiples)
    return Manifest(
        format="fewstep.export/1",
        family="wan",
        pipeline="WanPipeline",
        precision="fp32",
        graphs=dict.fromkeys(networks, graph),
        experts=experts,
        settings=SETTINGS,
    )
