"""The solver's tuned constants: they move the time it takes, never the optimum or its certificate."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FROM_STORE", "IN_MEMORY", "Tuning"]


@dataclass(frozen=True)
class Tuning:
    """How often, how far and in which portions. The defaults are for rows in memory."""

    # Fixed blocks converge more slowly the larger they are (17 epochs at 128 rows where 32 take 9): the
    # error that all rows share averages out only between blocks. Below 32 the matrix products suffer.
    block_rows: int = 32
    # Rows of the first working set at least, beside all positives. More of them spare a store some of the
    # violators of weights that are far from good; rows in memory come and go for nothing.
    seed_rows: int = 2000
    growth_rows: int = 8000  # A pass stops to optimise once it has added so many, or has doubled the set.
    evict_margin: float = 1.05  # A row may go when all its variables are 0 and its margins exceed this.
    # Idle rows stay until they are this share of the working set: whoever goes shifts the others, and the
    # blocks' Gram matrices, about an epoch's work, are lost.
    idle_share: float = 0.05
    max_epochs: int = 200  # It is optimised for no more epochs between two passes.
    # The bias takes proximal steps of lag this times the rows' mean |x|^2, where bias_scale^2 is more than
    # `tied` times the lag. On rows of length 1 with bias_scale 10 a lag of 1 takes twice the epochs of 0.2,
    # and no proximal steps 40 times as many.
    lag: float = 0.2
    tied: float = 2.0
    first_goal: float = 0.1  # The working set is optimised to this relative gap at first;
    goal_share: float = 0.03  # then to this share of the gap over all rows, where a pass costs little;
    final_goal: float = 0.5  # at last to this share of the tolerance.
    # A warm start has most of its working set already and aims at once at the final goal; the squared
    # hinge, whose epochs overstate the gap the most, at this multiple of the tolerance.
    warm_goal: float = 2.0
    # The gap seen during an epoch belongs to weights in motion, mostly several times too large. Where a
    # pass costs little it is trusted up to `trusted` times the goal, until a pass has shown it to be wrong.
    trusts_epochs: bool = True
    trusted: float = 2.0
    check_from: float = 6.0  # Else the true gap is computed from this multiple of the goal on.
    survey_every: float = (
        2  # Cold rows are surveyed at the latest when epochs since cost so many times as much.
    )
    # At a survey at least so many epochs after the last one, each class is solved alone on its rows near the
    # margin. From a warm start the hinge's are known, and fewer epochs are enough before.
    polish_every: int = 6
    polish_every_warm: int = 3
    polish_margin: float = 1.02  # Near are rows of margin below this, or else below 1, if they are few:
    polish_rows: int = 4000  # at most so many in a class,
    polish_work: float = 40  # and their Gram matrices no more work than so many epochs.
    polish_tol: float = 0.3  # Violations of this share of the goal are left,
    polish_steps: int = 30  # or those after so many steps for each row.


IN_MEMORY = Tuning()

# Rows of a store cost a read: more of them come at first, they go at R-CNN's own distance, and every pass
# should be the last.
FROM_STORE = Tuning(seed_rows=20_000, evict_margin=1.2, goal_share=0, warm_goal=0.5, trusts_epochs=False)
