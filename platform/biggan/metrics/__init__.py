"""How good generated images are: feature extractors, FID and its companions."""
