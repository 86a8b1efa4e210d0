"""Adapters that are no plain LoRA: what they compute, shared by the trainer and the pipeline.

    lorad      rotations of weight columns (WaDi)
    two_time   a network told the time its step ends at (MeanFlow and other flow maps)
    policy     velocities of a whole step from one network call (pi-Flow), and `policy_head`, the
               output layer that gives them
    routing    which of several students a prompt belongs to (MSD)

Arithmetic and small modules on torch; files are `fewstep.adapters`, pipelines `fewstep.pipeline`.
"""
