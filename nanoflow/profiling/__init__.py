"""``nanoflow profile``: what the operations of a job's model take on this device, alone and beside each other."""
