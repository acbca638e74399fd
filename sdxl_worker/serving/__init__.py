"""What knows RunPod: start-up, the job loop, progress, answers, upload."""
