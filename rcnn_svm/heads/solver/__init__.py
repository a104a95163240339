"""Block dual coordinate ascent: many binary SVMs over the same rows, trained together.

For each class k, over the rows with label y in {+1, -1} (0 is ignored) and cost C_i:

    P(w) = 1/2 |w|^2 + sum_i C_i loss(y_i w.x_i),   loss(z) = max(0, 1 - z) or its square,

whose dual has one variable per row and class. The bias is one more feature of constant value
`bias_scale`. Weights and dual variables certify each other: the duality gap bounds the distance from
the optimum. `docs/heads.md` derives all of it.

`rows` says where rows come from, `weights` what is optimised, `working_set` which rows are visited,
`kernels` and `ascent` how, `tuning` how often; `solve` puts them together.
"""

from rcnn_svm.heads.solver.rows import MatrixSource, RowSource
from rcnn_svm.heads.solver.solve import BlockSolver, Solution
from rcnn_svm.heads.solver.tuning import Tuning

__all__ = ["BlockSolver", "MatrixSource", "RowSource", "Solution", "Tuning"]
