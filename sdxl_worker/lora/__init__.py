"""LoRAs: read and check a file, match it to the resident model, merge it into the weights, put them back."""
