-- move_user
-- What sql/move_user.sql does, in a database that has chatdb.move_user_v1: Citus lets no update change the user.

select conversations, messages, refusal
from chatdb.move_user_v1($1::text, $2::text)
