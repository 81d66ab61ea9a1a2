"""Recognises checkpoint files: their names, their types of numbers, or the other model that they hold."""
