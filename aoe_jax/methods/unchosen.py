"""The base class of the dense, SMEAR and THOR layers."""

from aoe_jax.moe.routing import Method


class Unchosen(Method):
    """A layer in which tokens do not choose experts."""

    def choice(self, experts):
        return None

    def check(self, config):
        config.balance.refuse_losses(f"a {self.name} layer has no load to balance; set it to 0")
        if config.mesh.transport == "all_to_all":
            wanted = f"is not implemented for experts.kind={self.name!r}; leave it at 'ring'"
            config.mesh.refuse("transport", wanted)
