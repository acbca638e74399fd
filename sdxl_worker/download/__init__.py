"""From a reference to a checked local file: references, guarded fetch, the Hub and Civitai, the shared cache."""
