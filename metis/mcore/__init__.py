"""The method inside megatron-core: parallel linears, layer spec, attention, norms, loss, initialisation."""
