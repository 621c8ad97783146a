"""Drawing charts: axes, strokes, and panels of lines with a legend."""
