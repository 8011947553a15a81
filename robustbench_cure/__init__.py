"""How robust is this image classifier really, and can the number be trusted?"""

__version__ = "0.1.0"
