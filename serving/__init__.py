"""The endpoint: a Ray Serve application that samples from the model store over HTTP."""
