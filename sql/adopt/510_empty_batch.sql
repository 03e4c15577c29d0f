-- empty_batch
-- Empties the tables of the batch, which otherwise the commit does.

truncate pg_temp.batch_conversations, pg_temp.batch_messages, pg_temp.batch_seqs, pg_temp.batch_moves
