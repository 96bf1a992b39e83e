"""Pipeline parallelism: schedules are data, and one executor runs any of them."""
