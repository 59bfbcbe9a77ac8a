"""What a model is worth: measurements that users and the command line share."""
