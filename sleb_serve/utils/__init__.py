"""What has nothing to do with models: strict JSON, files written whole, extras."""
