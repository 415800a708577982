"""GVM (arXiv 2505.02391): samples allocated to prompts, RAFT++ and GRPO on what comes back.

One iteration is an E-step (``sampling.py``: stage 1, verification, allocation, stage 2; every
response kept by ``store.py``) and an M-step (``m_step.py``: which responses make which optimizer
step). ``trainer.py`` drives both, ``engines.py`` samples.
"""
