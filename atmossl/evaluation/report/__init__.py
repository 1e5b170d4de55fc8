"""Tables, maps and curves of a verification."""
