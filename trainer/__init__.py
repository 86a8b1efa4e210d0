"""fewstep.trainer makes an adapter: distillation of a diffusion or flow teacher into a LoRA.

Start from the command line: `python -m fewstep.trainer --list`. In Python: `loop.train(config)`.
"""
