"""Where the blocks of a certification job are computed: in this process, or in many."""
