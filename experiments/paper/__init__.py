"""The paper's experiments, run by run (arXiv 2403.00853), and our results next to the authors'.

metamom reproduce mnist   --nodes 100 --lr 0.5 --beta 0.1 --bias topk:33500 --seed 0 --epochs 200 --run-dir RUN
metamom reproduce fashion --nodes 100 --lr 0.5 --beta 0.1 --bias topk:1%    --seed 0 --epochs 300 --run-dir RUN
metamom reproduce table   --paper RESULTS_DIR --run-dir RUN

`protocol` defines the two experiments, `nodes` the nodes' gradients, `memory` how many of them are computed at a time,
`training` an epoch, `run` the loop with its run directory, `published` the authors' files, `table` the comparison.
"""
