"""The pains of few-step users: what stock diffusers 0.42.1 does, what fewstep does instead.

Each test asserts the trap itself, so that it fails on the day diffusers closes it; then that
fewstep does not fall in; then that the doctor names it. The table is in docs/doctor.md.
"""
