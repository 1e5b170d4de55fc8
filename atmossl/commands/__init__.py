"""The commands, once their configuration is composed. Each has a module, which imports only what
it needs: commands that do not train need not wait for Lightning."""
