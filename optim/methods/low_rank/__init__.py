"""Published low-rank methods: each file has one equation and names the parts of the engine that it is made of."""
