"""Marks the folder whose modules (``helpers``) every test may import."""
