"""What charts are drawn with: axes, strokes, and panels of lines beside their legend."""
