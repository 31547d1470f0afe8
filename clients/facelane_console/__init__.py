"""facelane-console: a web page for people, on the SDK as any customer's program would be."""
