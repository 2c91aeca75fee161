"""The LoRA adapter: fresh on the base, found in a folder or on the Hub, opened, and proven to be the one that was trained."""
