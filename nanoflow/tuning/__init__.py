"""``nanoflow tune``: plans for a job, searched for and measured on its model and device."""
