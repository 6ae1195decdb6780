"""How sensitive training is to gamma and beta: whole grids for every optimizer, at several levels of bias."""
