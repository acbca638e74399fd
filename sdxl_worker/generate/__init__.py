"""From a request to pictures: the resident pipeline, samplers, modes, pictures in and out."""
