"""Training: stage 1 pre-trains the item table with SASRec+, stages 2 and 3 train ADRec around it."""
