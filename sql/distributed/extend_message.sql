-- extend_message
-- What sql/extend_message.sql does, in a database that has chatdb.extend_message_v1.

select length, refusal
from chatdb.extend_message_v1($1::text, $2::int8, $3::text, $4::int8, $5::text, $6::int8, $7::text)
