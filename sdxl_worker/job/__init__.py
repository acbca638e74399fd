"""One job from RunPod's queue to its answer: start-up, turns for the device, progress, pictures, upload."""
