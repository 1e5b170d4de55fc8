"""What the commands do, once their configuration is composed. A module for each, which imports what
it needs: only those that train wait for Lightning."""
