"""How sensitive training is to gamma and beta: full grids for every optimizer, at several levels of bias."""
