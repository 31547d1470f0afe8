"""The designs that facelane is measured against, written plainly, as one would at first.

Both load the very models that facelane serves and take the very same JPEG bytes.
"""
