-- transactional: false
-- Changes nothing: a validated constraint serves the release before as well.

set lock_timeout = '2s';
