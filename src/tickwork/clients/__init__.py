"""The Tinker-shaped clients. Each method returns a ``Future`` at once; each ``_async`` twin waits for acceptance."""
