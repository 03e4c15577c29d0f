-- Says whether this role sees the rows of all users, and whether the server can write.

select
    pg_catalog.row_security_active('chatdb.conversations')
    or pg_catalog.row_security_active('chatdb.messages')
    or pg_catalog.row_security_active('chatdb.message_parts') as has_row_security,
    pg_catalog.pg_is_in_recovery() as is_standby
