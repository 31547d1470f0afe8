"""The state that outlives the server: ``gallery`` over one ``sqlite`` file."""
