"""Little worlds whose whole truth is known, the models that read them, and the demo."""
