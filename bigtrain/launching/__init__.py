"""Put ranks of `bigtrain.train` on machines. Nothing here imports torch: a login node answers at once."""
