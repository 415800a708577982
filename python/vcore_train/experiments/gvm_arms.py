"""The arms of the study gvm: what samples and what learns."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """``options``: of :class:`GvmConfig`; ``steps``: times the optimizer steps of the others.

    ``few``: a quarter of the prompts with four times the samples, and twice the first stage.
    """

    name: str
    objective: str
    allocation: str = "uniform"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 1
    few: bool = False


REUSE = {"reuse_stage1": True}
ARMS = (
    Arm("RAFT++", "raft++"),
    Arm("GVM-RAFT++", "raft++", "gvm"),
    Arm("GVM-RAFT++, stage 1 reused", "raft++", "gvm", REUSE),
    Arm("Neyman-RAFT++", "raft++", "neyman"),
    Arm("Knapsack-RAFT++", "raft++", "knapsack"),
    Arm("Reinforce-Ada-RAFT++", "raft++", "reinforce_ada"),
    Arm("RAFT++, 4 x the steps", "raft++", steps=4),
    Arm("RAFT++, few prompts", "raft++", few=True),
    Arm("GVM-RAFT++, few prompts", "raft++", "gvm", few=True),
    Arm("Reinforce-Ada-RAFT++, few prompts", "raft++", "reinforce_ada", few=True),
    Arm("GRPO", "grpo"),
    Arm("GVM-GRPO", "grpo", "gvm"),
    Arm("Knapsack-GRPO", "grpo", "knapsack"),
    Arm("Reinforce-Ada-GRPO", "grpo", "reinforce_ada"),
)
BASE = {"raft++": "RAFT++", "grpo": "GRPO"}  # objective: its arm with uniform samples


def base_of(arm: Arm) -> str:
    """The arm with uniform samples that an arm is compared with."""
    return BASE[arm.objective] + (", few prompts" if arm.few else "")


def arm_named(name: str) -> Arm:
    return next(arm for arm in ARMS if arm.name == name)
