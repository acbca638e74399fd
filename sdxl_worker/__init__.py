"""SDXL with per-request LoRAs, as a RunPod serverless worker. Importing any module of this package does no work."""
