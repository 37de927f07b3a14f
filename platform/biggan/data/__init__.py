"""Prepared datasets: written once from images of any kind, read fast by training."""
